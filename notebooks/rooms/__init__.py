"""What single notebooks need: a folder for each subject, imported as `rooms` from notebooks/.

A room imports from its own folder and from floors below it. The top floor is `edits` and `cost`, which look at the
networks of other notebooks; then `smollm`; then the other folders, none of which knows another; then the modules beside
this file, which several rooms share.
"""
