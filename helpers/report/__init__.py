"""What no notebook calls: executing the notebooks (`execute`), what is made of them (`pages`,
`pdf`, `handin`), the benchmark (`bench`) and the README's table of results (`readme`)."""
