"""The models: one decoder, its presets, its data, and the step that trains it."""
