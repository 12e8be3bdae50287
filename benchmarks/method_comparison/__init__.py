"""Compare CROME with PEFT's methods on tasks with images: accuracy, what is lost, and what it costs."""
