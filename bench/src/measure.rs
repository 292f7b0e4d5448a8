//! Medians and short loops.

use std::hint::black_box;

use crate::machine::cpu_of_thread;

/// The middle of the values; of an even number the lower one of two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// The value at `quantile` (0..=1); of none, not a number.
pub(crate) fn quantile(values: &mut [f64], quantile: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1) as f64;
    values.get((last * quantile).ceil() as usize).copied().unwrap_or(f64::NAN)
}

/// CPU time of one call in nanoseconds: the median of [`REPETITIONS`] loops of about 40 ms. The call gets a running
/// number.
pub(crate) fn ns_per_call<T>(mut call: impl FnMut(usize) -> T) -> anyhow::Result<f64> {
    let mut time = |calls: usize| -> anyhow::Result<f64> {
        let begin = cpu_of_thread()?;
        for n in 0..calls {
            black_box(call(black_box(n)));
        }
        Ok((cpu_of_thread()? - begin).as_nanos() as f64)
    };
    let mut calls = 64;
    while time(calls)? < LOOP_NS / 4.0 {
        calls *= 2;
    }
    let loops = (0..REPETITIONS).map(|_| Ok(time(4 * calls)? / (4 * calls) as f64));
    Ok(median(loops.collect::<anyhow::Result<_>>()?))
}

const REPETITIONS: usize = 15;
const LOOP_NS: f64 = 40e6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quantiles_are_values_that_occurred() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.0);
        assert_eq!(median(vec![5.0]), 5.0);
        assert!(median(vec![]).is_nan());
        let mut values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.99), 99.0);
        assert_eq!(quantile(&mut values, 1.0), 100.0);
    }
}
