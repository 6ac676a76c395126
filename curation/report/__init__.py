"""report.html: one self-contained page: what to show, its pictures, its charts, its sections, put together."""
