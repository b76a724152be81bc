"""What all other packages use: errors, text, files, records. No tensors."""
