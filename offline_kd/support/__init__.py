"""What every room may use and that knows nothing of images: errors, durable files, the console, strict descriptions,
counter-based random numbers.
"""
