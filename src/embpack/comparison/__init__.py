"""Methods side by side: on an array, on the tables of a checkpoint, and which of them to choose."""
