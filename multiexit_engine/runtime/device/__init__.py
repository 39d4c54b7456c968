"""What any launched work needs of a device: memory that stays, captures and clocks."""
