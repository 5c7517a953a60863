"""Published methods as presets: one YAML a method."""
