//! `dalgu doctor`.

use dalgu_proto::v1;

use super::Session;
use crate::{
    args::site::DoctorArgs,
    exit::Error,
    output::{self, Format, doctor},
};

/// Does a command. What is found is shown before it becomes the exit code.
pub async fn run(args: &DoctorArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let deep = args.deep;
    let diagnosis = session
        .read(async |client| {
            let request = v1::GetDiagnosisRequest { deep };
            client.site().get_diagnosis(request).await
        })
        .await?;
    match session.format {
        Format::Table | Format::Wide => {
            let wide = session.format == Format::Wide;
            let text = doctor::render(&diagnosis, wide, session.term.color);
            session.term.print(&text)?;
        }
        Format::Name => session.term.print(&doctor::names(&diagnosis))?,
        Format::Json | Format::Yaml => output::one(session.term, session.format, &diagnosis)?,
    }
    match doctor::verdict(&diagnosis) {
        None => Ok(()),
        Some(verdict) => Err(Error::Unwell(verdict)),
    }
}
