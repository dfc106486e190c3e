"""Pages and tables that show a sweep. Knows the answer; decides nothing."""
