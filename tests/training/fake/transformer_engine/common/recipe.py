class Float8CurrentScaling:
    pass
