"""Other people's disks: what is downloaded from a model hub, where it is kept, and what is uploaded."""
