"""What lives while training runs, outside of compiled graphs."""
