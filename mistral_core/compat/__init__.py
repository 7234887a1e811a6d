"""Names and arguments that transformers has, and what this project answers to them."""
