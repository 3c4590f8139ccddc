"""From pairs of texts to margins, with one loaded model."""
