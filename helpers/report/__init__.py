"""What no notebook calls: executing the notebooks (`execute`), and what is made of them: pages
(`pages`), the PDF (`pdf`), the hand-in (`handin`), the benchmark (`bench`), the README's table
(`readme`).
"""
