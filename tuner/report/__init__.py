"""Pages and tables that show a sweep; knows the answer, and decides nothing."""
