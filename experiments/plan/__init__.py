"""The planner's command line and its pictures."""
