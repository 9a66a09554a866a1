"""A bank judged on itself: each task with its own adapter, and all that is akin, hidden."""
