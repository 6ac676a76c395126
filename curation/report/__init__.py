"""report.html: one self-contained page. What to show (choices), its pictures, its charts, its sections, put together."""
