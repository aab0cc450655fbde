//! Reads tables of text, `.csv` and `.tsv`, strictly. A lenient reader would drop or join parts of
//! a prompt; this one returns an error with the line instead.

/// A row of a table.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    /// The line in which the row begins, from 1.
    pub line: usize,
    /// The text of each cell, untrimmed.
    pub cells: Vec<String>,
}

/// The rows of a table, the header first, without blank rows. A cell in quotes may hold separators,
/// line ends and doubled quotes. If the header has one column, a line that does not begin with a
/// quote is one cell, separators included.
///
/// # Errors
/// The number of a line, and a message about the quotes in it.
pub(super) fn rows(text: &str, separator: char) -> Result<Vec<Row>, (usize, String)> {
    let mut cursor = Cursor { rest: text, line: 1, separator };
    let mut rows: Vec<Row> = Vec::new();
    while !cursor.rest.is_empty() {
        let single = rows.first().is_some_and(|header| header.cells.len() == 1);
        let row = cursor.row(single)?;
        if row.cells.iter().any(|c| !c.trim().is_empty()) {
            rows.push(row);
        }
    }
    Ok(rows)
}

/// The part of the table that is still to be read.
struct Cursor<'t> {
    rest: &'t str,
    line: usize,
    separator: char,
}

impl<'t> Cursor<'t> {
    /// Reads a row; `single`: the header has one column.
    fn row(&mut self, single: bool) -> Result<Row, (usize, String)> {
        let mut row = Row { line: self.line, cells: Vec::new() };
        if single && !self.rest.starts_with('"') {
            row.cells.push(self.until(&['\n']).to_string());
            self.end_line();
            return Ok(row);
        }
        loop {
            row.cells.push(match self.rest.starts_with('"') {
                true => self.quoted()?,
                false => self.until(&[self.separator, '\n']).to_string(),
            });
            match self.rest.strip_prefix(self.separator) {
                Some(rest) => self.rest = rest,
                None => {
                    self.end_line();
                    return Ok(row);
                }
            }
        }
    }

    /// Reads the text before the next of these characters, without the `\r` of a line end.
    fn until(&mut self, ends: &[char]) -> &'t str {
        let (cell, rest) = self.rest.split_at(self.rest.find(ends).unwrap_or(self.rest.len()));
        self.rest = rest;
        match rest.is_empty() || rest.starts_with('\n') {
            true => cell.strip_suffix('\r').unwrap_or(cell),
            false => cell,
        }
    }

    /// Reads a cell in quotes.
    fn quoted(&mut self) -> Result<String, (usize, String)> {
        let opened = self.line;
        let mut cell = String::new();
        loop {
            // Skip the quote that opens the cell, or the second quote of a pair inside the cell.
            self.rest = &self.rest[1..];
            let Some(end) = self.rest.find('"') else {
                let what =
                    "a cell opens with a quote that nothing closes; expected a `\"` at its end";
                return Err((opened, what.into()));
            };
            cell.push_str(&self.rest[..end]);
            self.line += self.rest[..end].matches('\n').count();
            self.rest = &self.rest[end + 1..];
            if !self.rest.starts_with('"') {
                break;
            }
            cell.push('"');
        }
        let after = self.rest.strip_prefix('\r').unwrap_or(self.rest);
        if !(after.is_empty() || after.starts_with('\n') || self.rest.starts_with(self.separator)) {
            let found: String = self.rest.chars().take(12).collect();
            return Err((
                self.line,
                format!(
                    "{found:?} follows the quote that closes a cell; expected a {:?} or the \
                     line's end, and each quote inside of a cell doubled",
                    self.separator
                ),
            ));
        }
        Ok(cell)
    }

    fn end_line(&mut self) {
        let rest = self.rest.strip_prefix('\r').unwrap_or(self.rest);
        self.rest = rest.strip_prefix('\n').unwrap_or(rest);
        self.line += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(text: &str) -> Vec<(usize, Vec<String>)> {
        rows(text, ',').unwrap().into_iter().map(|r| (r.line, r.cells)).collect()
    }

    #[test]
    fn cells_are_the_texts_between_separators_and_inside_quotes() {
        let text = "a,b\r\n\r\n\"x, \"\"y\"\"\nz\",\n1,\"2\"\n,\n 3 ,\"\"\"\"";
        let expected: [(usize, [&str; 2]); 4] =
            [(1, ["a", "b"]), (3, ["x, \"y\"\nz", ""]), (5, ["1", "2"]), (7, [" 3 ", "\""])];
        assert_eq!(cells(text), expected.map(|(line, c)| (line, c.map(str::to_string).to_vec())));
        assert_eq!(rows("a\tb\nx, y\tz\n", '\t').unwrap()[1].cells, ["x, y", "z"]);
    }

    #[test]
    fn a_line_of_a_table_with_one_column_is_whole() {
        let lines = cells("prompt\nSay \"a, b\", and c,\n\"d, e\"\r\nf\r\n");
        let texts: Vec<&str> = lines.iter().map(|(_, c)| c[0].as_str()).collect();
        assert_eq!(texts, ["prompt", "Say \"a, b\", and c,", "d, e", "f"]);
        assert!(lines.iter().all(|(_, c)| c.len() == 1));
    }

    #[test]
    fn quotes_that_do_not_fit_are_errors_with_their_line() {
        for (text, line, words) in [
            ("a,b\n1,\"2\n3,4\n", 2, "nothing closes"),
            ("a,b\n\"x\ny\" z,2\n", 3, "\" z,2"),
            ("a\n\"x\" y\n", 2, "doubled"),
        ] {
            let (at, what) = rows(text, ',').unwrap_err();
            assert!(at == line && what.contains(words), "{text:?}: line {at}: {what}");
        }
    }
}
