//! A small linear program: maximise `gains · x` where `sets · x ≤ 1` for every set, and `x ≥ 0`.
//!
//! The simplex method on a dense tableau (Dantzig 1947), with Bland's rule (1977), by which it always ends. There are some dozens of
//! variables and at most some hundreds of sets; everything 0 is a solution to begin with.

/// Numbers so small are taken for 0.
const NOTHING: f64 = 1e-9;

/// The best `x`. Every gain must be bounded by a set; one that is not stays as it is.
pub(super) fn maximise(gains: &[f64], sets: &[Vec<f64>]) -> Vec<f64> {
    let (variables, rows) = (gains.len(), sets.len());
    let width = variables + rows + 1;
    // Each row: the set, its slack, and the bound; the last row is the gains, as they are still to be had.
    let mut tableau: Vec<Vec<f64>> = sets
        .iter()
        .enumerate()
        .map(|(row, set)| {
            let mut line = vec![0.0; width];
            line[..variables].copy_from_slice(set);
            line[variables + row] = 1.0;
            line[width - 1] = 1.0;
            line
        })
        .collect();
    let mut gain = vec![0.0; width];
    gain[..variables].copy_from_slice(gains);
    let mut basis: Vec<usize> = (variables..variables + rows).collect();

    while let Some(enters) = (0..width - 1).find(|column| gain[*column] > NOTHING) {
        let ratio = |row: usize| tableau[row][width - 1] / tableau[row][enters];
        let bounded = (0..rows).filter(|row| tableau[*row][enters] > NOTHING);
        let leaves = bounded.min_by(|a, b| ratio(*a).total_cmp(&ratio(*b)).then(basis[*a].cmp(&basis[*b])));
        let Some(leaves) = leaves else {
            gain[enters] = 0.0;
            continue;
        };
        basis[leaves] = enters;
        let pivot = tableau[leaves][enters];
        tableau[leaves].iter_mut().for_each(|value| *value /= pivot);
        let line = tableau[leaves].clone();
        for row in (0..rows).filter(|row| *row != leaves) {
            eliminate(&mut tableau[row], &line, enters);
        }
        eliminate(&mut gain, &line, enters);
    }
    let mut best = vec![0.0; variables];
    for (row, column) in basis.iter().enumerate() {
        if *column < variables {
            best[*column] = tableau[row][width - 1].max(0.0);
        }
    }
    best
}

/// Takes so much of a line from a row that a column becomes 0 there.
fn eliminate(row: &mut [f64], line: &[f64], column: usize) {
    let factor = row[column];
    if factor.abs() > NOTHING {
        for (value, of_line) in row.iter_mut().zip(line) {
            *value -= factor * of_line;
        }
    }
    row[column] = 0.0;
}
