"""What a run will need, from its flags alone: memory, time, disk, and what would make it fit."""
