"""The bench: settings, sources, baselines, studies, explorers and reports around the method in `flowerlib`."""
