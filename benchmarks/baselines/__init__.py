"""Other people's methods, used only to measure this project against them."""
