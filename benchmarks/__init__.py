"""Speed, memory and size; each script prints, and with --write keeps, the table of its name in results/."""
