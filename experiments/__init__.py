"""Papers reproduced, each in a package of its own."""
