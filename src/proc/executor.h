/*-------------------------------------------------------------------------
 *
 * executor.h
 *	  Processes that run chunks, connected as the handlers' owner.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_EXECUTOR_H
#define REDRIVE_EXECUTOR_H

#include "postgres.h"

extern PGDLLEXPORT void redrive_executor_main(Datum arg);

#endif							/* REDRIVE_EXECUTOR_H */
