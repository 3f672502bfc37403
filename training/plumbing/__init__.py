"""What a Lightning run needs around a fit: resuming, several processes, progress, TensorBoard.

Nothing here knows what is being fitted.
"""
