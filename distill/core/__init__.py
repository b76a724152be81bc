"""What every part stands on: errors, text, files, records. No tensors."""
