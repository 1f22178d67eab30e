"""While an encoder is pretrained: do its features tell the classes apart, on a few labelled scans that are kept for that?"""
