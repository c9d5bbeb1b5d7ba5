"""Reports: one schema (`model`), rendered as Markdown, HTML and plots."""
