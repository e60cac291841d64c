"""What phicore keeps in the user's cache folder, to compute it only once.

`folders` knows what lies there, and clears it. `arrays` is a format for files of arrays that
processes map. `store` is a folder of such files with a limit, and `writing` fills it in the
background.
"""
