"""Tools that several test modules share: ranks in processes of their own, and the look for leftovers."""
