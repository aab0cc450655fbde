//! `strftime_now` for chat templates. The date is pinned, so that results don't change from one day
//! to the next.

/// The year of the pinned date: 1 January 2026, a Thursday, at midnight. The date has no time zone,
/// since transformers formats Python's `datetime.now()`, which has none.
const YEAR: u32 = 2026;

/// The text of a `strftime` directive in the C locale, if the directive gives a text.
fn directive(c: char) -> Option<String> {
    let text = match c {
        'a' => "Thu",
        'A' => "Thursday",
        'b' | 'h' => "Jan",
        'B' => "January",
        'c' => "Thu Jan  1 00:00:00 2026",
        'D' | 'x' => "01/01/26",
        'F' => "2026-01-01",
        'p' => "AM",
        'P' => "am",
        'r' => "12:00:00 AM",
        'R' => "00:00",
        'T' | 'X' => "00:00:00",
        'f' => "000000",
        's' => "1767225600",
        'n' => "\n",
        't' => "\t",
        'z' | 'Z' => "",
        '%' => "%",
        _ => return None,
    };
    Some(text.to_string())
}

/// The value, the width and the padding character of a directive that gives a number.
fn number(c: char) -> Option<(u32, usize, char)> {
    Some(match c {
        'Y' | 'G' => (YEAR, 4, '0'),
        'C' => (YEAR / 100, 2, '0'),
        'y' | 'g' => (YEAR % 100, 2, '0'),
        'm' | 'd' => (1, 2, '0'),
        'e' => (1, 2, ' '),
        'j' => (1, 3, '0'),
        'H' | 'M' | 'S' => (0, 2, '0'),
        'k' => (0, 2, ' '),
        'I' => (12, 2, '0'),
        'l' => (12, 2, ' '),
        'u' | 'w' => (4, 1, '0'),
        // Days before the first Sunday (%U) or Monday (%W) are in week 0; ISO 8601 says week 1.
        'U' | 'W' => (0, 2, '0'),
        'V' => (1, 2, '0'),
        _ => return None,
    })
}

/// The pinned date in a format of C's `strftime`, with glibc's flags: `-` for no padding, `_` for
/// blanks, `0` for zeros, `^` for capitals, `#` for the opposite case.
///
/// # Errors
/// An unknown directive.
pub(super) fn strftime(format: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut spelled = String::from('%');
        let mut flags = String::new();
        let last = loop {
            let Some(c) = rest.next() else { return Err(unknown(&spelled, format)) };
            spelled.push(c);
            match c {
                '-' | '_' | '0' | '^' | '#' => flags.push(c),
                // These ask for another calendar or other digits; the C locale has neither.
                'E' | 'O' => {}
                c => break c,
            }
        };
        let pad = flags.chars().rfind(|c| matches!(c, '-' | '_' | '0'));
        let text = match (directive(last), number(last)) {
            (Some(text), _) => text,
            (None, Some((n, width, own))) => match (pad, own) {
                (Some('-'), _) => n.to_string(),
                (Some('_'), _) | (None, ' ') => format!("{n:>width$}"),
                _ => format!("{n:0>width$}"),
            },
            (None, None) => return Err(unknown(&spelled, format)),
        };
        match flags.chars().rfind(|c| matches!(c, '^' | '#')) {
            Some('#') if last == 'p' => out += &text.to_lowercase(),
            Some(_) => out += &text.to_uppercase(),
            None => out += &text,
        }
    }
    Ok(out)
}

fn unknown(spelled: &str, format: &str) -> String {
    format!(
        "strftime_now({format:?}): `{spelled}` is no directive; expected those of C's strftime, \
         such as %d %B %Y, and %% for a percent sign"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directive_is_what_c_writes_for_the_pinned_date() {
        // Expected texts from `date -u -d 2026-01-01 +FORMAT`; those of %f, %z and %Z from a Python
        // datetime without a time zone.
        for (format, expected) in [
            ("%A, %-d %B %Y, %H:%M", "Thursday, 1 January 2026, 00:00"),
            ("%a %b %e %h %C%y", "Thu Jan  1 Jan 2026"),
            ("%d/%m/%y %-m/%-d %_m %0e", "01/01/26 1/1  1 01"),
            ("%j %-j %U %W %V %G %g %u %w", "001 1 00 00 01 2026 26 4 4"),
            ("%I:%M:%S %p %P %l %k %-I", "12:00:00 AM am 12  0 12"),
            (
                "%c|%x|%X|%D|%F|%T|%R|%r",
                "Thu Jan  1 00:00:00 2026|01/01/26|00:00:00|01/01/26|2026-01-01|00:00:00|00:00|\
                 12:00:00 AM",
            ),
            ("%^a %^B %#p %#b %Ey %Od", "THU JANUARY am JAN 26 01"),
            ("100 %% of%n%t%s.%f[%z%Z]", "100 % of\n\t1767225600.000000[]"),
            ("no date: é", "no date: é"),
        ] {
            assert_eq!(strftime(format).as_deref(), Ok(expected), "{format}");
        }
    }

    #[test]
    fn a_directive_that_there_is_not_is_an_error_that_names_it() {
        for (format, named) in
            [("%d %Q", "`%Q`"), ("%-é", "`%-é`"), ("50 %", "`%`"), ("%10Y", "`%1`")]
        {
            let error = strftime(format).unwrap_err();
            assert!(error.contains(named) && error.contains("%d %B %Y"), "{error}");
        }
    }
}
