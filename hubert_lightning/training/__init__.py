"""Everything that uses Lightning: tasks, data modules, callbacks, runs."""
