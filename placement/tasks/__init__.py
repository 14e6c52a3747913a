"""What the command line and the service are asked to do: read a trace, build its problem, solve it, say it.

The only room beside the command line that knows both packages, `placement` and `traces`.
"""
