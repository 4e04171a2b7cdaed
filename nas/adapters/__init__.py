"""Our strategies in other people's loops: each file is one, needs its own library, and is imported when it is used."""
