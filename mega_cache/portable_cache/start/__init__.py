"""What a start runs: it compiles nothing, measures nothing, and imports neither room."""
