"""Files that survive: written whole or not at all, named plainly, read again when storage fails."""
