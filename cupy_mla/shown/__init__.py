"""How things are shown: tables on the terminal, tables and pictures in notebooks and files."""
