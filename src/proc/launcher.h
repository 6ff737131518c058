/*-------------------------------------------------------------------------
 *
 * launcher.h
 *	  One process that starts a supervisor per database.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_LAUNCHER_H
#define REDRIVE_LAUNCHER_H

#include "postgres.h"

extern void redrive_register_launcher(void);
extern PGDLLEXPORT void redrive_launcher_main(Datum arg);

#endif							/* REDRIVE_LAUNCHER_H */
