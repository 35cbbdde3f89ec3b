"""A trained exit for a frozen model: data from the model itself, distillation, search by speed."""
