"""One HTML page about a run, or about several: everything in one file, no script, nothing fetched.

curves (what is drawn) ─► charts (Matplotlib, as SVG) ─► run, compared ─► markup (HTML; all text is escaped there)
"""
