"""The long run at full size, fed by a bundle and a recipe of phases."""
