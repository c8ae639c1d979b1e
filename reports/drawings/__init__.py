"""SVG by hand and by seaborn: networks, timelines, charts."""
