"""Speed, memory and size; each script prints, and with --write keeps, its table in results/."""
