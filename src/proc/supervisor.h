/*-------------------------------------------------------------------------
 *
 * supervisor.h
 *	  One process per database that starts executors and rescues orphans.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SUPERVISOR_H
#define REDRIVE_SUPERVISOR_H

#include "postgres.h"

extern PGDLLEXPORT void redrive_supervisor_main(Datum arg);

#endif							/* REDRIVE_SUPERVISOR_H */
