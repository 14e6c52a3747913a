"""Every picture that reports, notebooks and the dashboard show: one noun a file, plotly figures out.

A figure function takes arrays or results and returns a figure without a theme of its own; fonts, grid and
colours of text come from whoever shows it (`placement.report.figures.look`).
"""
