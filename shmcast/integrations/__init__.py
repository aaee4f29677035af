"""shmcast for other programs. Nothing here is imported by the library, and each module needs its own extra."""
