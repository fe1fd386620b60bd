"""A real pair of models: the distance to the teacher over tokens and processor seconds, here and in TRL."""
