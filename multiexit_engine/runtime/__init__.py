"""The step loop: schedule, run, update, report."""
