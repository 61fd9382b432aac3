"""What a selection and a running model keep, in numbers."""
